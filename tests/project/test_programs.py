"""Programs that the fork server runs are what they would be if Python were started anew, down to the processes that they start."""

from __future__ import annotations

import pytest

from program import run_python

STARTED = """
import multiprocessing, os, sys, time
from concurrent.futures import ProcessPoolExecutor
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(os.getcwd).result() == os.getcwd()
        assert pool.submit(os.getenv, "GIVEN").result() == "here"
        assert pool.submit(os.getpid).result() != os.getpid()
        print(pool.submit(eval, "'trl' in __import__('sys').modules").result())
    ends = context.Process(target=sys.exit, args=(7,))
    ends.start()
    ends.join()
    stays = context.Process(target=time.sleep, args=(600,))
    stays.start()
    stays.terminate()
    stays.join()
    print(ends.exitcode, stays.exitcode)
"""


@pytest.mark.parametrize("way", ["spawn", "forkserver"])
def test_multiprocessing_starts_its_processes_from_the_server(way: str) -> None:
    done = run_python("-c", STARTED, way, env={"GIVEN": "here"})
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["True", "7", "-15"], "with the libraries there, and each ending as it ends"
    assert not done.stderr
