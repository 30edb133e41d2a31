"""Traces for the page: density and kept mass over branch, step, layer and head, packed."""

import base64
import json
import zlib
from typing import Any

import numpy as np

TRACE_BYTES = 700_000  # of all, packed
MAP_BYTES = 700_000
KINDS = {"dense": "d", "search": "s", "reuse": "r"}
SCALE, UNKNOWN = 10_000, 65_535  # values as uint16


def pack_trace(stored: dict[str, Any]) -> dict[str, Any] | None:
    """What a trace file holds, as arrays (branch, step, layer, head); None where it holds nothing.

    `kinds` has a letter for each (branch, step, layer), a blank where nothing ran; `density` and
    `kept_mass` are uint16 ten-thousandths, little-endian, deflated, base64; 65535 is unknown.
    """
    entries = stored["trace"]
    if not entries:
        return None
    branches = list(dict.fromkeys(entry["branch"] for entry in entries))
    steps = sorted({entry["step"] for entry in entries})
    layers = sorted({entry["layer"] for entry in entries})
    values = [entry[key] or [] for entry in entries for key in ("density", "kept_mass")]
    shape = len(branches), len(steps), len(layers), max(map(len, values)) or 1
    packed = {key: np.full(shape, UNKNOWN, "<u2") for key in ("density", "kept_mass")}
    kinds = np.full(shape[:3], " ")
    for entry in entries:
        place = (
            branches.index(entry["branch"]),
            steps.index(entry["step"]),
            layers.index(entry["layer"]),
        )
        kinds[place] = KINDS[entry["kind"]]
        for key, array in packed.items():
            if entry[key] is not None:
                array[place] = np.clip(np.array(entry[key]) * SCALE, 0, SCALE).round()
    return {
        "branches": branches,
        "steps": steps,
        "layers": layers,
        "heads": shape[3],
        "kinds": "".join(kinds.flatten()),
        **{key: deflated(array.tobytes()) for key, array in packed.items()},
    }


def pack_block_maps(stored: dict[str, Any]) -> str | None:
    """The block maps of a trace file, deflated JSON; None where it has none."""
    maps = stored.get("maps")
    return deflated(json.dumps(maps).encode()) if maps else None


def deflated(content: bytes) -> str:
    return base64.b64encode(zlib.compress(content, 9)).decode()


class TraceBook:
    """Packs traces as long as there is room; what no longer fits is left out."""

    def __init__(self) -> None:
        self.room = {"trace": TRACE_BYTES, "maps": MAP_BYTES}

    def pack(self, stored: dict[str, Any]) -> dict[str, Any] | None:
        packed, maps = pack_trace(stored), pack_block_maps(stored)
        if packed is None or not self.fits("trace", packed["density"] + packed["kept_mass"]):
            return None
        return {**packed, "maps": maps if maps and self.fits("maps", maps) else None}

    def fits(self, kind: str, text: str) -> bool:
        if len(text) > self.room[kind]:
            return False
        self.room[kind] -= len(text)
        return True
