"""The controller of `lambda_schedule: adaptive`, which sets lambda from feedback."""

from dataclasses import dataclass


# Increase of the multiplier for a shortfall of one standard deviation
GAIN = 3.0
# Shortfalls are clipped to this many standard deviations; early in training all log-ratios are close to each other
MAX_SHORTFALL = 3.0


@dataclass
class LambdaController:
    r"""
    Moves lambda to hold a statistic of the chosen answers at a target, by dual ascent on a constraint.

    DPO under the constraint that the mean log-ratio of the chosen answers is at the target has the Lagrangian
    \\( \mathcal{L}_{\mathrm{DPO}} - \nu\,(\mathrm{E}[\Delta_w] - \Delta^*) \\). With \\( c = \beta\sigma(-z) \\), its
    gradient with respect to the two log-probabilities of a pair is \\( (-c - \nu,\; c) \\). That of DPO-Shift is
    \\( (-c,\; \lambda c) \\). Up to a common scale, the two are equal if

    $$ \lambda = \frac{1}{1 + \mu}, \qquad \mu = \nu / c \ge 0. $$

    Decreasing lambda therefore corresponds to increasing the Lagrange multiplier, as dual ascent does while the
    constraint is violated. Pure dual ascent (an integral) oscillates around the target, because the log-ratio itself
    integrates lambda. A term proportional to the shortfall damps the oscillation, as in the augmented Lagrangian and
    in [PID Lagrangian methods](https://huggingface.co/papers/2007.03964). After each optimizer step,

    $$ e = \frac{\langle \Delta^* - \overline{\Delta_w} \rangle}{\langle s \rangle}, \qquad
       I \leftarrow \mathrm{clip}(I + K e / T), \qquad \mu = \mathrm{clip}(I + K e), $$

    where \\( \overline{\Delta_w} \\) and \\( s \\) are the mean and standard deviation over the pairs of the step, and
    angle brackets are exponential moving averages over steps. The average of the shortfall starts at 0, so that lambda
    starts to move slowly. Clipping keeps lambda within its bounds and prevents integral windup.

    Measured in standard deviations, the shortfall depends neither on \\( \beta \\) nor on the length of the answers,
    and its noise depends only on the number of pairs. If the target is a share of chosen answers that fell, the
    shortfall is the measured share minus the target, and \\( s = 1/2 \\).

    The controller assumes that

    - a lower lambda makes the chosen answers rise. To first order, this holds if the gradients of the chosen and the
      rejected log-probability point in a similar direction.
    - the pairs of a step have not been trained on before. In later epochs, measured log-ratios are too high.
    - a change of \\( \mu \\) by 1 moves the measurement by less than \\( 2 / K \\) standard deviations per step.
      Otherwise the loop is unstable, although lambda stays within its bounds.

    Args:
        target (`float`):
            Target for the mean chosen log-ratio, in nats, or for the share of chosen answers that fell.
        lambda_min (`float`):
            Lower bound of lambda, in (0, 1].
        lambda_max (`float`):
            Upper bound of lambda, in (0, 1].
        smoothing_steps (`float`):
            Time constant of the moving averages, in optimizer steps.
        integral_steps (`float`):
            \\( T \\): number of optimizer steps after which the integral of a constant shortfall contributes as much
            as the proportional term.
        mean_shortfall (`float`, *optional*, defaults to `0.0`):
            State: moving average of the shortfall.
        mean_spread (`float`, *optional*, defaults to `0.0`):
            State: moving average of the standard deviation, not yet divided by its weight.
        weight (`float`, *optional*, defaults to `0.0`):
            State: weight of the steps in `mean_spread` so far.
        integral (`float`, *optional*, defaults to `0.0`):
            State: \\( I \\).
    """

    target: float
    lambda_min: float
    lambda_max: float
    smoothing_steps: float
    integral_steps: float
    mean_shortfall: float = 0.0
    mean_spread: float = 0.0
    weight: float = 0.0
    integral: float = 0.0

    @property
    def _bounds(self) -> tuple[float, float]:
        """Bounds of the multiplier."""
        return 1 / self.lambda_max - 1, 1 / self.lambda_min - 1

    def _clip(self, multiplier: float) -> float:
        smallest, largest = self._bounds
        return min(max(multiplier, smallest), largest)

    @property
    def shortfall(self) -> float:
        """Smoothed shortfall, in standard deviations. 0 if all log-ratios are equal, as before the first step."""
        ratio = self.mean_shortfall * self.weight / self.mean_spread if self.mean_spread > 0 else 0.0
        return min(max(ratio, -MAX_SHORTFALL), MAX_SHORTFALL)

    @property
    def shift_lambda(self) -> float:
        """Current lambda."""
        multiplier = self._clip(self.integral + GAIN * self.shortfall)
        return min(max(1 / (1 + multiplier), self.lambda_min), self.lambda_max)

    def update(self, shortfall: float, spread: float) -> float:
        """
        Update the state with the measurement of one optimizer step, and return lambda for the next step.

        Args:
            shortfall (`float`):
                Target minus mean chosen log-ratio over the pairs of all processes, in nats, or share minus target.
            spread (`float`):
                Standard deviation over the same pairs, in the same unit.

        Returns:
            `float`: Lambda between `lambda_min` and `lambda_max`.
        """
        rate = 1 / self.smoothing_steps
        self.mean_shortfall += rate * (shortfall - self.mean_shortfall)
        self.mean_spread += rate * (spread - self.mean_spread)
        self.weight += rate * (1 - self.weight)
        self.integral = self._clip(self.integral + GAIN * self.shortfall / self.integral_steps)
        return self.shift_lambda
