"""Run train.py and compose.py as a terminal would, from a process that has torch imported and forks: a tenth of a second each, not five."""

import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200", "TQDM_DISABLE": "1"}


class Commands:
    """A parent process of commands; each runs in a fork of it, in a folder of its own choice."""

    def __init__(self):
        line = [sys.executable, "-m", "tests.commands"]
        self.process = subprocess.Popen(line, cwd=ROOT, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, folder, script, *arguments):
        """Exit code, standard output and standard error of `python script.py arguments...` in a folder."""
        self.process.stdin.write(json.dumps([str(folder), script, arguments]) + "\n")
        self.process.stdin.flush()
        return tuple(json.loads(self.process.stdout.readline()))

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def run(folder, script, arguments):
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if not child:
            os.dup2(out.fileno(), 1)
            os.dup2(err.fileno(), 2)
            os.chdir(folder)
            sys.argv = [f"{script}.py", *arguments]
            runpy.run_path(str(ROOT / f"{script}.py"), run_name="__main__")
            sys.exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0), err.seek(0)
        return code, out.read(), err.read()


if __name__ == "__main__":
    import hydra  # noqa: F401

    import skillbank

    for name in skillbank.__all__:
        getattr(skillbank, name)
    for line in iter(sys.stdin.readline, ""):
        print(json.dumps(run(*json.loads(line))), flush=True)
