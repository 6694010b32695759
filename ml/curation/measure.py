"""What a picture says without a model: its colours by name, and what the camera does."""

from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from ml.curation.footage import Footage, Pixels
from ml.curation.scorers.motion import WIDTH_PX, Flow, flows

Kind = Literal["", "still", "pans left", "pans right", "tilts up", "tilts down", "zooms in", "zooms out"]

STILL_SHARE = 0.01
EXPLAINED_SHARE = 0.5
ZOOM_SHARE = 0.02

# Upper ends of hue ranges on OpenCV's half-degree scale, 0 to 180; red closes the circle.
HUES = ((7, "red"), (20, "orange"), (34, "yellow"), (82, "green"), (97, "teal"), (130, "blue"), (150, "purple"))
HUES_TAIL = ((170, "pink"), (181, "red"))
GRAY_SATURATION, PALE_SATURATION, BLACK_VALUE, DARK_VALUE, WHITE_VALUE = 34, 72, 40, 110, 205


@dataclass(frozen=True)
class Camera:
    """What the camera does (empty where no single movement explains the flow), and how fast.

    `speed` is the shift in picture widths per second; `zoom` the growth of the picture per second (0.1 is 10 %).
    """

    kind: Kind
    speed: float
    zoom: float


def camera_of(footage: Footage) -> Camera:
    """Camera movement: shift and zoom fitted to each pair's flow, median over pairs.

    Still is below 1 % of the picture width a second. A shift or zoom counts when at least half of the pixels move as it
    says, within half a pixel or 40 %: an object that moves in front of a still camera is no pan.
    """
    fits = np.array([_fit(flow) for flow in flows(footage)])
    shift_x, shift_y, zoom, explained = np.median(fits, axis=0)
    seconds = footage.interval_seconds
    x, y = shift_x / WIDTH_PX / seconds, shift_y / WIDTH_PX / seconds
    speed, growth = float(np.hypot(x, y)), float(zoom / seconds)
    if explained < EXPLAINED_SHARE:
        return Camera("", speed, growth)
    if abs(growth) > ZOOM_SHARE and abs(growth) / 4 > speed:  # at a quarter width from the centre, zoom moves more
        return Camera("zooms in" if growth > 0 else "zooms out", speed, growth)
    if speed < STILL_SHARE:
        return Camera("still", speed, growth)
    if abs(x) >= abs(y):
        return Camera("pans left" if x > 0 else "pans right", speed, growth)
    return Camera("tilts up" if y > 0 else "tilts down", speed, growth)


def colours_of(frame: Pixels, limit: int = 2) -> tuple[str, ...]:
    """Names of the commonest colours of an RGB frame, each at least a sixth of the picture, most common first."""
    names, shares = _named_shares(frame)
    chosen = [name for name, share in zip(names, shares, strict=True) if share >= 1 / 6][:limit]
    return tuple(chosen or names[:1])


def vertical_colours(frame: Pixels) -> tuple[str, str]:
    """Commonest colour of the upper and of the lower third."""
    third = max(1, len(frame) // 3)
    return colours_of(frame[:third], 1)[0], colours_of(frame[-third:], 1)[0]


def _fit(flow: Flow) -> tuple[float, float, float, float]:
    """Shift x, shift y (pixels), zoom (share) of one flow field, and the share of pixels that move so.

    The median over the field is the shift; the zoom is the median slope of the flow along the way from the centre.
    Every fourth pixel of every fourth row will do.
    """
    height, width = flow.shape[:2]
    flow = flow[::4, ::4]
    ys, xs = np.mgrid[0:height:4, 0:width:4].astype(np.float32)
    xs, ys = xs - (width - 1) / 2, ys - (height - 1) / 2
    shift_x, shift_y = float(np.median(flow[..., 0])), float(np.median(flow[..., 1]))
    radius = np.square(xs) + np.square(ys)
    far = radius > np.square(height / 4)
    slope = ((flow[..., 0] - shift_x) * xs + (flow[..., 1] - shift_y) * ys)[far] / radius[far]
    zoom = float(np.median(slope))
    model = np.stack([shift_x + zoom * xs, shift_y + zoom * ys], axis=-1)
    residual = np.hypot(*np.moveaxis(flow - model, -1, 0))
    allowed = np.maximum(0.5, 0.4 * np.hypot(*np.moveaxis(model, -1, 0)))
    return shift_x, shift_y, zoom, float((residual <= allowed).mean())


def _named_shares(frame: Pixels) -> tuple[list[str], list[float]]:
    small = cv2.resize(frame, (64, 36), interpolation=cv2.INTER_AREA)
    hue, saturation, value = (channel.astype(int) for channel in cv2.split(cv2.cvtColor(small, cv2.COLOR_RGB2HSV)))
    names = _names(hue, saturation, value)
    found, counts = np.unique(names, return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [str(found[i]) for i in order], [float(counts[i] / names.size) for i in order]


def _names(
    hue: npt.NDArray[np.int_], saturation: npt.NDArray[np.int_], value: npt.NDArray[np.int_]
) -> npt.NDArray[np.str_]:
    steps = (*HUES, *HUES_TAIL)
    words = np.array([word for _, word in steps])[np.searchsorted([end for end, _ in steps], hue, side="right")]
    tone = np.where(value < DARK_VALUE, "dark ", np.where(saturation < PALE_SATURATION, "pale ", ""))
    named = np.char.add(tone, words)
    named = np.where((words == "orange") & (value < DARK_VALUE + 40), "brown", named)
    grays = np.where(value >= WHITE_VALUE, "white", "gray")
    named = np.where(saturation < GRAY_SATURATION, grays, named)
    return np.where(value < BLACK_VALUE, "black", named)
