"""Add up the JUnit reports that pytest left in a folder: one line with what passed and what did not."""

import sys
from pathlib import Path
from xml.etree import ElementTree as ET


def main(folder: Path) -> int:
    """Print the counts of all reports; 1 if a test failed, or if there are reports but no test ran."""
    tests = failed = skipped = 0
    reports = sorted(folder.glob("*.xml"))
    for report in reports:
        # The reports were written a moment ago by our own pytest.
        for suite in ET.parse(report).getroot().iter("testsuite"):  # noqa: S314
            tests += int(suite.get("tests", "0"))
            failed += int(suite.get("failures", "0")) + int(suite.get("errors", "0"))
            skipped += int(suite.get("skipped", "0"))
    passed = tests - failed - skipped
    if reports:
        print(f"{passed} passed, {failed} failed, {skipped} skipped")
    return int(failed > 0 or (bool(reports) and passed == 0))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
