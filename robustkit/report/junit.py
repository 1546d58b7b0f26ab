"""JUnit XML: a test case a gate, a variant and a failed step, for CI systems."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from robustkit.report.tables import display_name, failed_name, gate_text, percent
from robustkit.results import Results

_FORBIDDEN = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(results: Results) -> str:
    """Return the XML: a gate that does not hold is a failure, a variant with a *wrong* flag too.

    A step that failed is an error.
    """
    root = ElementTree.Element("testsuites", name=_clean(results.name or "robustkit"))
    gates = ElementTree.SubElement(root, "testsuite", name="gates", tests=str(len(results.gates)))
    failures = 0
    for gate in results.gates:
        case = ElementTree.SubElement(gates, "testcase", classname="gates", name=_clean(gate.text))
        if not gate.holds:
            failures += 1
            ElementTree.SubElement(case, "failure", message=_clean(f"{gate.verdict}: {gate_text(gate)}"))
    gates.set("failures", str(failures))
    suite = ElementTree.SubElement(root, "testsuite", name="variants", tests=str(len(results.variants)))
    failures = 0
    for row in results.variants:
        case = ElementTree.SubElement(suite, "testcase", classname="variants", name=_clean(display_name(row, results)))
        case.set("time", f"{row.seconds + row.train_seconds:.3f}")
        wrong = [flag for flag in row.flags if flag.severity == "wrong"]
        failures += bool(wrong)
        for flag in wrong:
            ElementTree.SubElement(case, "failure", message=_clean(f"{flag.id}: {flag.message}"))
        text = f"clean {percent(row.clean.value)} %, worst case {percent(row.worst.value)} %"
        ElementTree.SubElement(case, "system-out").text = text
    suite.set("failures", str(failures))
    if results.failures:
        _failed_steps(root, results)
    ElementTree.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ElementTree.tostring(root, encoding="unicode") + "\n"


def _failed_steps(root: ElementTree.Element, results: Results) -> None:
    count = str(len(results.failures))
    suite = ElementTree.SubElement(root, "testsuite", name="failed steps", tests=count, errors=count)
    for one in results.failures:
        case = ElementTree.SubElement(suite, "testcase", classname="failed steps")
        case.set("name", _clean(failed_name(one, results)))
        ElementTree.SubElement(case, "error", message=_clean(one.message))


def _clean(text: str) -> str:
    return _FORBIDDEN.sub("?", text)
