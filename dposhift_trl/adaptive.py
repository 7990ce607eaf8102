"""Lambda from feedback: the controller behind `lambda_schedule: adaptive`."""

from dataclasses import dataclass


# Steps over which the measurement is smoothed
SMOOTHING_STEPS = 5
# What the multiplier gains for a shortfall of one unit of reward (or of the share)
GAIN = 4.0


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
    [PID Lagrangian methods](https://huggingface.co/papers/2007.03964). After optimizer step \\( t \\), with the
    shortfall \\( e_t \\) of that step's pairs smoothed over a few steps,

    $$ I_t = \mathrm{clip}(I_{t-1} + K e_t / T), \qquad \mu_t = \mathrm{clip}(I_t + K e_t), $$

    both clipped to the range in which lambda is within its bounds, so that the integral does not wind up. The
    shortfall is \\( \beta\,(\Delta^* - \overline{\Delta_w}) \\), in units of reward, whose scale does not depend on
    \\( \beta \\) or on the length of answers as that of nats does; for the share of chosen answers that fell, it is
    the share itself minus the target.

    Assumes that a lower lambda makes the chosen answers rise, which to first order it does where the gradients of
    the chosen and the rejected log-probability point the same way; that the pairs of a step have not been trained on
    before, so that later epochs read too high; and that a step moves \\( \beta\,\overline{\Delta_w} \\) by less than
    \\( 2 / K \\) for a change of \\( \mu \\) by 1, beyond which the loop is unstable (lambda stays bounded).

    Args:
        target (`float`):
            Target of the mean chosen log-ratio, in nats, or of the share.
        unit (`float`):
            Factor from shortfall to reward: beta for the log-ratio, -1 for the share, of which more is worse.
        lambda_min (`float`), lambda_max (`float`):
            Bounds of lambda, in (0, 1].
        integral_steps (`float`):
            \\( T \\), the steps in which a lasting shortfall has as much say by the integral as at once.
        smoothed (`float`), weight (`float`), integral (`float`):
            State: the smoothed shortfall before its correction for the start, the weight of what it is made of, and
            \\( I \\), which starts where lambda is `lambda_max`.
    """

    target: float
    unit: float
    lambda_min: float
    lambda_max: float
    integral_steps: float
    smoothed: float = 0.0
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
        """Smoothed shortfall, in units of reward; 0 before the first measurement."""
        return self.smoothed / self.weight if self.weight else 0.0

    @property
    def shift_lambda(self) -> float:
        """Lambda in force."""
        multiplier = self._clip(self.integral + GAIN * self.shortfall)
        return min(max(1 / (1 + multiplier), self.lambda_min), self.lambda_max)

    def update(self, measured: float) -> float:
        """
        Take the statistic of one optimizer step's pairs, and return lambda for the next.

        Args:
            measured (`float`):
                Mean chosen log-ratio, in nats, or share of chosen answers that fell, over all processes.

        Returns:
            `float`: Within `lambda_min` and `lambda_max`.
        """
        rate = 1 / SMOOTHING_STEPS
        self.smoothed += rate * (self.unit * (self.target - measured) - self.smoothed)
        self.weight += rate * (1 - self.weight)
        self.integral = self._clip(self.integral + GAIN * self.shortfall / self.integral_steps)
        return self.shift_lambda
