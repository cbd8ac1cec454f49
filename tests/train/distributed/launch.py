"""torchrun, for tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent.parent


def torchrun(processes: int, module: str, *arguments: object, options: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start it on this host, on a free port; stdout and stderr come together."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return subprocess.Popen(
        [*command, *options, "-m", module, *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "src", ROOT)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str], timeout: float = 240) -> str:
    """Its output; it must end well."""
    output, _ = process.communicate(timeout=timeout)
    assert process.returncode == 0, output
    return output
