"""Makes ICC profiles from the colour information of PNG chunks."""

import operator
import struct
from collections.abc import Sequence
from typing import Final

from PIL import ImageCms

_Vector = Sequence[float]

SRGB: Final = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))

#: The primaries of sRGB, as in `from_chromaticities`.
_BT709: Final = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)

#: The Bradford cone responses to X, Y and Z, and the white point of ICC profiles.
_BRADFORD: Final = ((0.8951, -0.7502, 0.0389), (0.2664, 1.7135, -0.0685), (-0.1614, 0.0367, 1.0296))
_D50: Final = (0.9642, 1.0, 0.8249)


def from_chromaticities(exponent: float, xy: _Vector | None) -> bytes:
    """The profile for a gamma `exponent` and x and y of white, red, green and blue; ``None`` stands for sRGB's.

    Empty if there is no such colour space.
    """
    xy = xy or _BT709
    try:
        white, *primaries = [(x / y, 1.0, (1 - x - y) / y) for x, y in zip(xy[::2], xy[1::2], strict=True)]
        amounts = _amounts(primaries, white)
        columns = [
            _adapted([each * amount for each in primary], white)
            for primary, amount in zip(primaries, amounts, strict=True)
        ]
    except ZeroDivisionError:
        return b""
    # The profile of sRGB, with its curve and primaries replaced.
    profile = bytearray(SRGB.tobytes())
    tags = {bytes(profile[at : at + 4]): at for at in range(132, 132 + 12 * profile[131], 12)}
    for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), columns, strict=True):
        (at,) = struct.unpack_from(">I", profile, tags[name] + 4)
        struct.pack_into(">3i", profile, at + 8, *map(_fixed, column))
    (at,) = struct.unpack_from(">I", profile, tags[b"rTRC"] + 4)
    struct.pack_into(">5i", profile, at + 12, _fixed(exponent), _fixed(1), 0, 0, 0)
    return bytes(profile)


def _adapted(colour: _Vector, white: _Vector) -> _Vector:
    """The colour adapted from this white point to that of ICC profiles."""
    response, target, source = (_mixed(_BRADFORD, each) for each in (colour, _D50, white))
    return _amounts(_BRADFORD, [each * to / by for each, to, by in zip(response, target, source, strict=True)])


def _mixed(columns: Sequence[_Vector], amounts: _Vector) -> _Vector:
    return [sum(map(operator.mul, amounts, row)) for row in zip(*columns, strict=True)]


def _amounts(columns: Sequence[_Vector], target: _Vector) -> _Vector:
    """The amounts of the columns whose mix is the target (Cramer's rule)."""
    a, b, c = columns
    whole = _determinant(a, b, c)
    return [_determinant(*each) / whole for each in ((target, b, c), (a, target, c), (a, b, target))]


def _determinant(a: _Vector, b: _Vector, c: _Vector) -> float:
    return a[0] * (b[1] * c[2] - b[2] * c[1]) - b[0] * (a[1] * c[2] - a[2] * c[1]) + c[0] * (a[1] * b[2] - a[2] * b[1])


def _fixed(value: float) -> int:
    """The number as s15Fixed16, clamped to its range."""
    return max(-(2**31), min(2**31 - 1, round(value * 65536)))
