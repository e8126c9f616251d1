"""The `ds4jax` command: its help, its one-line errors and its exit statuses.

A command of the tests' own, `probe`, is run through the real entry in a process of its
own, because absl's flags belong to the process.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import ds4jax
from ds4jax.cli import COMMANDS

DRIVER = """
import sys
import ds4jax.experiments
from ds4jax import cli
ds4jax.experiments.__path__.append(sys.argv[1])
cli.COMMANDS["probe"] = "a command of the tests"
sys.exit(cli.main(sys.argv[2:]))
"""

PROBE = '''
"""Do what the flags say.

Example:
    ds4jax probe model.gguf --context=3
"""
from absl import flags
from ds4jax.errors import CapacityError

ARGUMENTS = ("FILE",)
_CONTEXT = flags.DEFINE_integer("context", 7, "Positions to keep.", lower_bound=1)
_MODE = flags.DEFINE_enum("mode", None, ["plain", "warm"], "How.", required=True)
_LOUD = flags.DEFINE_bool("loud", False, "Say more")
_STOPS = flags.DEFINE_list("stops", [], "Texts to stop at.")

def main(argv):
    if argv[1] == "interrupt":
        raise KeyboardInterrupt
    if argv[1] == "fail":
        raise CapacityError("context 9: at most 8\\nfit")
    if argv[1] == "defect":
        raise ValueError("a defect")
    if argv[1] == "flood":
        for line in range(10**5):
            print(line)
    print(argv, _CONTEXT.value, _MODE.value, _LOUD.value)
    return 5 if argv[1] == "five" else None
'''

HELP = """\
ds4jax probe FILE [flags]

Do what the flags say.

Example:
    ds4jax probe model.gguf --context=3

Flags:
  --context=INT
      Positions to keep (default 7).
  --mode=plain|warm
      How (required).
  --[no]loud
      Say more (default false).
  --stops=STRINGS
      Texts to stop at.
"""


@pytest.fixture
def command(tmp_path):
    (tmp_path / "probe.py").write_text(PROBE)
    return lambda *words: [sys.executable, "-c", DRIVER, str(tmp_path), *words]


@pytest.fixture
def run(command):
    def run(*words: str) -> tuple[int, str, str]:
        done = subprocess.run(
            command(*words), capture_output=True, text=True, timeout=60
        )
        return done.returncode, done.stdout, done.stderr

    return run


def test_every_module_with_a_main_is_a_command_and_the_other_way_round():
    modules = {
        path.stem
        for path in Path(ds4jax.__file__).parent.glob("experiments/*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == "main"
    }
    assert modules == set(COMMANDS)


def test_overview_lists_every_command_with_its_line(run):
    status, out, err = run()
    assert (status, err) == (0, "")
    for name, line in COMMANDS.items():
        assert f"  {name:10}{line}\n" in out
    for words in (["--help"], ["-h"], ["help"]):
        assert run(*words) == (status, out, err)


def test_overview_does_not_wait_for_jax():
    code = (
        "import sys; from ds4jax import cli; cli.main([]); print('jax' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_module_entry_tells_the_version():
    done = subprocess.run(
        [sys.executable, "-m", "ds4jax", "--version"], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, f"ds4jax {ds4jax.__version__}\n")


@pytest.mark.parametrize(
    "words",
    [["probe", "--help"], ["help", "probe"], ["probe", "-h"], ["probe", "x", "--help"]],
)
def test_help_shows_the_commands_own_flags_only(run, words):
    assert run(*words) == (0, HELP, "")


def test_flags_and_arguments_reach_main_in_any_order(run):
    expected = "['probe', 'a.gguf'] 3 warm True\n"
    assert run("probe", "a.gguf", "--context=3", "--mode", "warm", "--loud") == (
        0, expected, "",
    )  # fmt: skip
    assert run("probe", "--loud", "--mode=warm", "--context=3", "a.gguf")[1] == expected


@pytest.mark.parametrize(
    "words, message",
    [
        ("prob", "unknown command 'prob'; did you mean probe?"),
        ("zzz", "unknown command 'zzz'; see --help"),
        ("help zzz", "unknown command 'zzz'; see --help"),
        ("--mode=warm", "expected a command before --mode=warm; see --help"),
    ],
)
def test_an_unknown_command_is_one_line_and_status_2(run, words, message):
    assert run(*words.split()) == (2, "", f"ds4jax: {message}\n")


@pytest.mark.parametrize(
    "words, message",
    [
        ("f --contxt=3", "unknown flag --contxt; did you mean --context?"),
        ("f --zzz", "unknown flag --zzz; see --help"),
        ("f", "missing --mode=plain|warm"),
        ("--mode=warm", "missing FILE; see --help"),
        ("f g --mode=warm", "unexpected argument 'g'"),
        ("f --mode=cold", "flag --mode=cold: value should be one of <plain|warm>"),
        ("f --context=0", "flag --context=0: 0 is not a positive integer"),
        (
            "f --context=x",
            "flag --context=x: invalid literal for int() with base 10: 'x'",
        ),
        ("fail --mode=warm", "context 9: at most 8 fit"),
    ],
)
def test_a_users_mistake_is_one_line_and_status_2(run, words, message):
    assert run("probe", *words.split()) == (2, "", f"ds4jax probe: {message}\n")


def test_a_missing_extra_is_named(run, tmp_path):
    (tmp_path / "probe.py").write_text("raise ModuleNotFoundError(name='optax')")
    message = "ds4jax probe: needs optax: pip install 'ds4jax[train]'\n"
    assert run("probe") == (2, "", message)


def test_the_status_of_main_is_the_processes(run):
    assert run("probe", "five", "--mode=warm")[0] == 5


def test_an_interrupt_is_quiet(run):
    assert run("probe", "interrupt", "--mode=warm") == (130, "", "")


@pytest.mark.parametrize("output", ["flood", "line"])
def test_a_closed_pipe_is_quiet(command, output, monkeypatch):
    """Whether it closes while the command writes or before its last flush."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with subprocess.Popen(
        command("probe", output, "--mode=warm"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 141


def test_a_defect_is_not_hidden(run):
    status, _, err = run("probe", "defect", "--mode=warm")
    assert status == 1
    assert err.startswith("Traceback") and "ValueError: a defect" in err
