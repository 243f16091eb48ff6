"""The completion scripts: made for three shells, tried in bash, and no load on a command line that only asks for help."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from opdgeo.commands import COMMANDS, parser
from opdgeo.commands.completion import SHELLS, script
from opdgeo.diagnostics import DIAGNOSTICS
from program import run_opdgeo

TRY = """
source ./script
try() {
    COMP_WORDS=(opdgeo "$@"); COMP_CWORD=$#; COMPREPLY=()
    f=$(complete -p opdgeo | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
    $f opdgeo "${@: -1}" ""
    echo "${COMPREPLY[*]}"
}
try com; try compare --eng; try compare --engine ""; try explain stab; try published Kl; try compare ste
"""


@pytest.mark.parametrize("shell", SHELLS)
def test_the_script_knows_commands_options_and_names(shell: str) -> None:
    text = script(parser(), shell)
    for command in COMMANDS:
        assert command.__name__.rpartition(".")[2] in text
    for word in ("mask-share", "Polaris-4B-Preview", *DIAGNOSTICS):
        assert word in text, word
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=text, text=True, check=True)


def test_bash_completes(tmp_path: Path) -> None:
    done = run_opdgeo("--completion", "bash")
    assert done.returncode == 0, done.stderr
    (tmp_path / "script").write_text(done.stdout)
    (tmp_path / "step-000020").mkdir()
    said = subprocess.run(["bash", "-c", TRY], cwd=tmp_path, text=True, capture_output=True, check=True).stdout
    assert said.splitlines() == [
        "compare",
        "--engine",
        "local ray",
        "stable_rank",
        "Klear-Reasoner-8B-SFT Klear-Reasoner-8B",
        "step-000020",
    ]
