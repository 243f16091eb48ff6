"""What a page costs: of one pair, and of a mixture of many experts.

    python benchmarks/report.py                      # the packaged pair, as `opdgeo demo` measures it
    python benchmarks/report.py --matrices 5000      # a made-up mixture of so many matrices, every diagnostic

Seconds of processor time, beyond the start of Python and the imports of numpy and polars, that `write_report` takes in a fresh process;
the peak of memory; the size of the page. `--against FOLDER` runs the same with the `opdgeo` in FOLDER (a checkout's `src`) in turn, and
prints the ratio.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = """
import json, resource, sys
import numpy, polars
def seconds():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
before = seconds()
from opdgeo.report import write_report
page = write_report(sys.argv[1])
print(json.dumps({"seconds": seconds() - before, "bytes": page.stat().st_size,
                  "peak": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}))
"""


def measure(out: Path, source: Path) -> dict[str, float]:
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", PAGE, str(out)], env=environment, capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, help="of a made-up mixture; default: the packaged pair")
    parser.add_argument("--against", type=Path, help="the src folder of another version")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    import opdgeo

    own = Path(opdgeo.__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        make = [sys.executable, "-m", "opdgeo", "demo", "--no-report", "-o", out]
        if args.matrices:  # in a process of its own: its memory is not the page's
            make = [sys.executable, Path(__file__).with_name("mixture.py"), out, str(args.matrices)]
        subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
        versions = {"this": own} | ({"other": args.against} if args.against else {})
        runs: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
        for _ in range(args.repeats):
            for name, source in versions.items():
                runs[name].append(measure(out, source))
    best = {}
    for name, found in runs.items():
        best[name] = min(one["seconds"] for one in found)
        page, peak = found[0]["bytes"] / 1e6, max(one["peak"] for one in found) / 1e6
        print(f"{name:6} {best[name]:6.2f} s of processor time, page {page:.2f} MB, peak {peak:.0f} MB")
    if args.against:
        print(f"ratio  {best['other'] / best['this']:6.2f}")


if __name__ == "__main__":
    main()
