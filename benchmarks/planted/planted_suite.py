"""All kinds and controls of the planted suite, by name."""

from __future__ import annotations

import base_kinds
import data_kinds
import label_kinds
import loop_kinds
import planted_controls
import setting_kinds
from planted_case import Control, Kind

_ALL = (*label_kinds.KINDS, *data_kinds.KINDS, *setting_kinds.KINDS, *base_kinds.KINDS, *loop_kinds.KINDS)
KINDS: dict[str, Kind] = {kind.name: kind for kind in _ALL}
CONTROLS: dict[str, Control] = {control.name: control for control in planted_controls.CONTROLS}
assert len(KINDS) == len(_ALL) and len(CONTROLS) == len(planted_controls.CONTROLS), "a name stands twice"
