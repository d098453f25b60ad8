"""Where the oracles lie: what other code computed on the same data, kept outside the repository."""

import os
from pathlib import Path

ORACLES = Path(os.environ.get("VLM_ORACLES") or Path(__file__).resolve().parents[2] / "shared" / "oracles")
