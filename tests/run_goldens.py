"""Runs golden cases: `python tests/run_goldens.py DIR [DIR ...] [--only KIND] [--skip KIND]`.

Every folder below the DIRs with a case.json is run by the runner of its `system` and `kind`. Per recorded tensor the
maximum absolute and relative error (relative to the largest recorded magnitude), the tolerance and the verdict are
printed; a recorded tensor that was neither an input nor compared is a failure, as is a kind nobody runs. Kinds that
belong to a later issue are listed as such. Exit code 1 if anything failed or nothing was found.
"""

import argparse
import os
import sys
import time
import traceback
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

from torchvision_shim import install as _install_torchvision_shim

_install_torchvision_shim()

from golden_kinds import DEFERRED, RUNNERS, GoldenCase, Row, find_cases, load_runners


def run_case(path):
    """Runs one case folder; returns the case with its rows (errors become failed rows)."""
    case = GoldenCase(path)
    load_runners(case.system)
    runner = RUNNERS.get((case.system, case.kind))
    if runner is None:
        case.rows.append(Row(f"{case.system}/{case.kind}", False, note="no runner for this kind"))
        return case
    try:
        runner(case)
    except Exception as error:
        traceback.print_exc()
        case.rows.append(Row("(runner)", False, note=f"{type(error).__name__}: {error}"[:300]))
    for name in case.unused():
        case.rows.append(Row(name, False, note="recorded, but neither used as an input nor compared"))
    return case


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", metavar="DIR")
    parser.add_argument("--only", action="append", metavar="KIND", help="run only this kind (repeatable)")
    parser.add_argument("--skip", action="append", default=[], metavar="KIND", help="skip this kind (repeatable)")
    parser.add_argument("--quiet", action="store_true", help="print failed rows and one line per case")
    arguments = parser.parse_args(argv)

    cases = find_cases(arguments.folders)
    counts = {"passed": 0, "failed": 0, "deferred": 0, "skipped": 0}
    for path in cases:
        case = GoldenCase(path)
        load_runners(case.system)
        if (arguments.only and case.kind not in arguments.only) or case.kind in arguments.skip:
            counts["skipped"] += 1
            continue
        if (case.system, case.kind) in DEFERRED:
            counts["deferred"] += 1
            print(f"LATER   {path}  [{case.kind}] {DEFERRED[case.system, case.kind]}")
            continue
        start = time.perf_counter()
        case = run_case(path)
        good = bool(case.rows) and all(row.passed for row in case.rows)
        counts["passed" if good else "failed"] += 1
        print(f"{'PASS' if good else 'FAIL'}    {path}  [{case.kind}] {time.perf_counter() - start:.1f}s")
        for row in case.rows:
            if not row.passed or not arguments.quiet:
                mark = "ok  " if row.passed else "FAIL"
                print(
                    f"    {mark} {row.name:50s} abs {row.max_abs:.2e} rel {row.max_rel:.2e}  {row.tolerance}  {row.note}"
                )
    print(", ".join(f"{number} {name}" for name, number in counts.items()) + f" of {len(cases)} cases")
    return 0 if cases and not counts["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
