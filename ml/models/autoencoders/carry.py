"""Channels that carry a signal through a fresh network unchanged, so that training an autoencoder starts at a picture.

Every carried signal x has a pair of channels, x and -x: silu(x) - silu(-x) = x, so the activation before the output
convolution cancels. The group norm before it does not: it divides by the spread of the group. So a group that carries a
signal also holds a pair of constants, K and -K, beside which the signal hardly counts: the norm then divides by nearly
the same number whatever the input, and the output convolution multiplies by it. Groups of fewer than four channels
have no room for constants; there the norm takes each signal's spread away.
"""

from dataclasses import dataclass

from torch import Tensor, nn

# Beside signals of spread 0.5 a norm then hardly moves. Twice as much starts up to 0.1 dB nearer and trains no better
# (160 steps on small pictures of edges and clouds: 24.6 against 23.7 dB; 14.5 dB from random weights).
CONSTANT = 4.0
# Spread that is assumed of every channel that holds no constant.
ASSUMED_STD = 0.5
# Log variance that a fresh posterior starts with. At 0 the noise of a sample (1) drowns the mean, whose spread is far
# below 1 before training, and the decoder's first steps are lost on it.
FIRST_LOGVAR = -8.0


@dataclass(frozen=True)
class Lanes:
    """Which channels carry what: the positive one of each signal (its negative is the next), and the constants.

    `gain` undoes the group norm at the end of the lanes, which divides by the root mean square of its group.
    """

    signals: tuple[int, ...]
    constants: tuple[int, ...]
    gain: float


def lanes(num_signals: int, group: int, width: int) -> Lanes | None:
    """Lanes for so many signals, up to a norm in groups of `group`, where the narrowest level has `width` channels.

    Constants are left out where there is no room for them; None when there is none for the signals either.
    """
    pairs = min(group // 2 - 1, num_signals)
    if pairs > 0:
        signals = tuple(group * (i // pairs) + 2 * (i % pairs) for i in range(num_signals))
        constants = tuple(group * g + 2 * pairs for g in range(-(-num_signals // pairs)))
        if max(*signals, *constants) + 2 <= width:
            others = (group - 2) * ASSUMED_STD**2
            return Lanes(signals, constants, ((2 * CONSTANT**2 + others) / group) ** 0.5)
    return Lanes(tuple(range(0, 2 * num_signals, 2)), (), ASSUMED_STD) if 2 * num_signals <= width else None


def scatter(convolution: nn.Module, lanes: Lanes, gain: float = 1.0) -> None:
    """Let input channel i start lane i, with its mirror image."""
    for source, out in enumerate(lanes.signals):
        connect(convolution, out, source, gain)
        connect(convolution, out + 1, source, -gain)
    _hold(convolution, lanes)


def keep(convolution: nn.Module, lanes: Lanes, tap: Tensor | None = None) -> None:
    """Let every lane pass; `tap` is the kernel it passes through, the present pixel by default."""
    _hide(convolution, lanes)
    for channel in _both(lanes.signals):
        connect(convolution, channel, channel, 1.0, tap)
    _hold(convolution, lanes)


def keep_doubled(convolution: nn.Module, lanes: Lanes) -> None:
    """Let every lane pass through a convolution whose channels 2c and 2c+1 are two frames: a line between two inputs.

    The second frame is the present one, and the first lies half way back to the one before.
    """
    weight, bias = _parts(convolution)
    _hide(convolution, lanes)
    tap = present(weight)
    halfway = 0.5 * (tap + tap.roll(-1, 0))
    for channel in _both(lanes.signals):
        connect(convolution, 2 * channel, channel, 1.0, halfway)
        connect(convolution, 2 * channel + 1, channel, 1.0)
    for channel, value in _constants(lanes):
        weight[2 * channel : 2 * channel + 2] = 0.0
        if bias is not None:
            bias[2 * channel : 2 * channel + 2] = value


def gather(convolution: nn.Module, lanes: Lanes, gain: float = 1.0) -> None:
    """Let lane i become output channel i, after norm and SiLU."""
    _hide(convolution, lanes)
    for out, source in enumerate(lanes.signals):
        connect(convolution, out, source, gain * lanes.gain)
        connect(convolution, out, source + 1, -gain * lanes.gain, clear=False)


def connect(
    convolution: nn.Module, out: int, source: int, gain: float, tap: Tensor | None = None, clear: bool = True
) -> None:
    """Let channel `out` be gain x channel `source` under the kernel `tap`; `clear` takes its other inputs away."""
    weight, _ = _parts(convolution)
    tap = present(weight) if tap is None else tap
    if clear:
        weight[out] = 0.0
    weight[out, source] = gain * tap


def present(weight: Tensor) -> Tensor:
    """The kernel that takes the present pixel: its middle in space, and in time its last, since pads are causal."""
    kernel = weight.shape[2:]
    tap = weight.new_zeros(kernel)
    tap[(-1,) * (len(kernel) - 2) + (kernel[-2] // 2, kernel[-1] // 2)] = 1.0
    return tap


def soften(net: nn.Module) -> None:
    """Random convolutions that keep their input's variance, without biases."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Conv3d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="linear")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def quiet(convolution: nn.Module, channels: int) -> None:
    """Let the log variances, the outputs after the first `channels`, be FIRST_LOGVAR for every input."""
    weight, bias = _parts(convolution)
    weight[channels:] = 0.0
    if bias is not None:
        bias[channels:] = FIRST_LOGVAR


def _hold(convolution: nn.Module, lanes: Lanes) -> None:
    """Constants come from the bias, so that no pad dims them; a convolution without one hands them on."""
    weight, bias = _parts(convolution)
    for channel, value in _constants(lanes):
        if bias is not None:
            weight[channel] = 0.0
            bias[channel] = value
        elif channel < weight.shape[1]:
            connect(convolution, channel, channel, 1.0)


def _hide(convolution: nn.Module, lanes: Lanes) -> None:
    """Constants tell nothing: let no channel start by reading them, lest it drown in them."""
    _parts(convolution)[0][:, _both(lanes.constants)] = 0.0


def _constants(lanes: Lanes) -> list[tuple[int, float]]:
    values = (CONSTANT, -CONSTANT) * len(lanes.constants)
    return list(zip(_both(lanes.constants), values, strict=True))


def _both(channels: tuple[int, ...]) -> list[int]:
    return [channel + mirror for channel in channels for mirror in (0, 1)]


def _parts(convolution: nn.Module) -> tuple[Tensor, Tensor | None]:
    if not isinstance(convolution, nn.Conv2d | nn.Conv3d):
        raise TypeError(f"{type(convolution).__name__} is no convolution: it has no weight to carry a channel with")
    return convolution.weight, convolution.bias
