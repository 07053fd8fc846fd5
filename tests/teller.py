"""How `exercises.py check` runs tests: one line a claim, and all that the first broken one says."""
import sys
import textwrap
from pathlib import Path

import pytest


class Teller:
    """A pytest plugin that takes the place of pytest's own terminal output."""
    def __init__(self):
        self.held, self.broken = 0, 0

    def pytest_collectreport(self, report):
        if report.failed:  # the file cannot even be imported
            self.pytest_runtest_logreport(report)

    def pytest_runtest_logreport(self, report):
        if not report.failed and getattr(report, "when", None) != "call":
            return
        self.held, self.broken = self.held + report.passed, self.broken + report.failed
        claim = report.nodeid.split("::")[-1].removeprefix("test_").replace("_", " ")
        print(f"  {'✗' if report.failed else '✓'} {claim}", flush=True)
        if report.failed and self.broken == 1:
            crash = getattr(report.longrepr, "reprcrash", None)
            said = "\n".join(str(report.longrepr).splitlines()[-4:])
            if crash:
                said = f"{crash.message}\n({Path(crash.path).name}, line {crash.lineno})"
            print(textwrap.indent(said.removeprefix("AssertionError: "), "      "))


def tell(root, tests):
    """Run some tests of root/tests; returns how many claims held and how many broke."""
    sys.dont_write_bytecode = True  # an edit within a second must not meet the old bytecode
    quiet = ["-p", "no:terminal", "-p", "no:cacheprovider", "-W", "ignore", f"--rootdir={root}"]
    teller = Teller()
    code = pytest.main([*quiet, *(f"{root}/tests/{test}" for test in tests)], plugins=[teller])
    return teller.held, teller.broken or int(code != 0)
