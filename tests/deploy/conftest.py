"""Puts deploy/load on the path: its package is not installed, as it is no part of what is served."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2] / "deploy" / "load"))
