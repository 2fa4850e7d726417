import pytest

from tests.fuzz import frame


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> None:
    frame.running = pyfuncitem.nodeid


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not frame.EXAMPLES or not frame.tried:
        return
    terminalreporter.section("fuzzing")
    for test, count in sorted(frame.tried.items()):
        found = frame.crashes.get(test, set())
        terminalreporter.write_line(f"{count:>9,} inputs tried, {len(found)} crashes: {test}")
        for error in sorted(found):
            terminalreporter.write_line(f"          {error}")
    total = sum(map(len, frame.crashes.values()))
    terminalreporter.write_line(f"{sum(frame.tried.values()):>9,} inputs tried, {total} crashes in all")
