"""Lambda from feedback: the controller behind `lambda_schedule: adaptive`."""

from dataclasses import dataclass


# What the multiplier gains for a shortfall of one standard deviation
GAIN = 3.0
LARGEST = 3.0  # standard deviations that a shortfall counts for; early on all pairs are alike, and any is many


@dataclass
class LambdaController:
    r"""
    Holds a statistic of the chosen answers at a target by moving lambda, by dual ascent on the constraint.

    DPO under the constraint that the chosen answers' mean log-ratio stays at a target has the Lagrangian
    \\( \mathcal{L}_{\mathrm{DPO}} - \nu\,(\mathrm{E}[\Delta_w] - \Delta^*) \\). With \\( c = \beta\sigma(-z) \\), its
    gradient with respect to the log-probabilities of a pair is \\( (-c - \nu,\; c) \\), that of DPO-Shift is
    \\( (-c,\; \lambda c) \\): but for their common scale they are the same where

    $$ \lambda = \frac{1}{1 + \mu}, \qquad \mu = \nu / c \ge 0. $$

    So lambda is the multiplier in disguise, and the constraint is kept by raising the multiplier while it is broken.
    Pure dual ascent (an integral) swings about the target, since the log-ratio itself integrates lambda; a term
    proportional to the shortfall damps it, as in the augmented Lagrangian and in
    [PID Lagrangian methods](https://huggingface.co/papers/2007.03964). After each optimizer step,

    $$ e = \frac{\langle \Delta^* - \overline{\Delta_w} \rangle}{\langle s \rangle}, \qquad
       I \leftarrow \mathrm{clip}(I + K e / T), \qquad \mu = \mathrm{clip}(I + K e), $$

    where \\( \overline{\Delta_w} \\) and \\( s \\) are mean and standard deviation over the step's pairs, the brackets
    exponential means over steps, that of the shortfall from 0 so that lambda sets out slowly, and the clips keep
    lambda within its bounds, so that the integral does not wind up.
    Counted in standard deviations, the shortfall depends neither on \\( \beta \\) nor on the length of answers, and
    its noise only on the number of pairs. For the share of chosen answers that fell, it is the share minus the target,
    and \\( s = 1/2 \\).

    Assumes that a lower lambda makes the chosen answers rise, which to first order it does where the gradients of
    the chosen and the rejected log-probability point the same way; that the pairs of a step have not been trained on
    before, so that later epochs read too high; and that a change of \\( \mu \\) by 1 moves the measurement by less
    than \\( 2 / K \\) standard deviations a step, beyond which the loop is unstable (lambda stays bounded).

    Args:
        target (`float`):
            Target of the mean chosen log-ratio, in nats, or of the share.
        lambda_min (`float`), lambda_max (`float`):
            Bounds of lambda, in (0, 1].
        smoothing_steps (`float`), integral_steps (`float`):
            Steps of the exponential means, and \\( T \\), in which a lasting shortfall has as much say by the integral
            as at once.
        mean_shortfall (`float`), mean_spread (`float`), weight (`float`), integral (`float`):
            State: the two exponential means, what the second is made of so far, and \\( I \\).
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
        return 1 / self.lambda_max - 1, 1 / self.lambda_min - 1

    def _clip(self, multiplier: float) -> float:
        least, most = self._bounds
        return min(max(multiplier, least), most)

    @property
    def shortfall(self) -> float:
        """Smoothed shortfall, in standard deviations; 0 where all pairs are alike, as before the first step."""
        ratio = self.mean_shortfall * self.weight / self.mean_spread if self.mean_spread > 0 else 0.0
        return min(max(ratio, -LARGEST), LARGEST)

    @property
    def shift_lambda(self) -> float:
        """Lambda in force."""
        multiplier = self._clip(self.integral + GAIN * self.shortfall)
        return min(max(1 / (1 + multiplier), self.lambda_min), self.lambda_max)

    def update(self, shortfall: float, spread: float) -> float:
        """
        Take what one optimizer step's pairs say, over all processes, and return lambda for the next step.

        Args:
            shortfall (`float`):
                How far the measured statistic falls short of the target, in nats or as a share.
            spread (`float`):
                Its standard deviation over pairs, in the same unit.

        Returns:
            `float`: Within `lambda_min` and `lambda_max`.
        """
        rate = 1 / self.smoothing_steps
        self.mean_shortfall += rate * (shortfall - self.mean_shortfall)
        self.mean_spread += rate * (spread - self.mean_spread)
        self.weight += rate * (1 - self.weight)
        self.integral = self._clip(self.integral + GAIN * self.shortfall / self.integral_steps)
        return self.shift_lambda
