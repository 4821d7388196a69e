"""Reads packed exports with numpy and safetensors, without torch. For other runtimes, which call `read_packed`, and for
`packed`, which describes the layout.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

STEM, CODES, SCALES = "packed", ".codes", ".scales"
PACKING, QUANTISATION = "student_packing", "student_quantisation"  # entries of config.json
VERSION = 1


def read_packed(folder: Path | str) -> dict[str, np.ndarray]:
    """The model's tensors by name, with quantised weights dequantised to float32.

    ValueError if the folder holds no packed export, or one of a quantiser that is not supported here.
    """
    from safetensors.numpy import load_file

    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    packing = config.get(PACKING) or {}
    if packing.get("version") != VERSION:
        raise ValueError(f"{folder} holds no packed student of version {VERSION}: its config has no such {PACKING}")
    quantiser = config[QUANTISATION]["quantiser"]
    if quantiser not in DECODERS:
        raise ValueError(f"{folder}: got quantiser {quantiser}, expected one of {', '.join(DECODERS)}")
    tensors: dict[str, np.ndarray] = {}
    for file in files_of(folder):
        tensors |= load_file(file)
    for name, width in packing["widths"].items():
        codes = unpack(tensors.pop(name + CODES), width)
        tensors[name] = DECODERS[quantiser](codes, tensors.pop(name + SCALES))
    return tensors


def files_of(folder: Path) -> list[Path]:
    """The files that hold the tensors."""
    index = folder / f"{STEM}.safetensors.index.json"
    if not index.is_file():
        return [folder / f"{STEM}.safetensors"]
    return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]


def unpack(packed: np.ndarray, width: int) -> np.ndarray:
    """Codes 0 to 3 [..., width] from bytes that hold four each, the first in the lowest bits."""
    codes = (packed[..., None] >> np.array([0, 2, 4, 6], np.uint8)) & np.uint8(3)
    return codes.reshape(*packed.shape[:-1], -1)[..., :width]


def seq2_weight(codes_OI: np.ndarray, step_O: np.ndarray) -> np.ndarray:
    """(code - 1.5) times the row's step."""
    return (codes_OI.astype(np.float32) - np.float32(1.5)) * step_O[:, None]


def fairy2i_weight(codes_SUOI: np.ndarray, scales_SUP: np.ndarray) -> np.ndarray:
    """The real matrix [[Re U + Re W, Im W - Im U], [Im U + Im W, Re U - Re W]], with U and W summed over the stages."""
    real, imaginary = np.zeros((2, 2, *codes_SUOI.shape[2:]), np.float32)
    cosine, sine = np.array([[1, 0, -1, 0], [0, 1, 0, -1]], np.float32)
    for codes_UOI, scales_UP in zip(codes_SUOI, scales_SUP, strict=True):
        real += cosine[codes_UOI] * scales_UP[:, 0, None, None]
        imaginary += sine[codes_UOI] * scales_UP[:, 1, None, None]
    (u_re, w_re), (u_im, w_im) = real, imaginary
    return np.block([[u_re + w_re, w_im - u_im], [u_im + w_im, u_re - w_re]])


DECODERS: dict[str, Any] = {"seq2": seq2_weight, "fairy2i": fairy2i_weight}
