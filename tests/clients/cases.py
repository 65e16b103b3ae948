"""The tests' own tiny runner: @case("what"), then finish("suite")."""
import sys, traceback

_cases = []


def case(what):
    def add(test):
        _cases.append((what, test))
        return test
    return add


def finish(suite, skip=False):
    failed = 0
    if skip:
        _cases.clear()
    for what, test in _cases:
        try:
            test()
            print(f"ok   {suite}: {what}", flush=True)
        except Exception as why:
            failed += 1
            at = traceback.extract_tb(why.__traceback__)[-1]
            print(f"FAIL {suite}: {what}: {type(why).__name__} {why} ({at.name}:{at.lineno} `{at.line}`)", flush=True)
    print(f"{suite}: {len(_cases) - failed} passed, {failed} failed", flush=True)
    sys.exit(1 if failed else 0)
