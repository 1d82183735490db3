"""``memlm doctor``: is this machine ready?"""

from dataclasses import dataclass

from memlm.cli.options import show


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Check this installation: versions, threads, memory, index, and a store written and read."""

    json: bool = False
    """Print the report as JSON."""

    def run(self) -> int:
        """Examine, print, and say by the exit code whether all is well."""
        from memlm.methods.checkup import checkup

        findings = checkup()
        text = "\n".join(
            f"{'ok  ' if finding.ok else 'BAD '} {finding.name}: {finding.detail}"
            for finding in findings
        )
        value = {
            "ok": all(finding.ok for finding in findings),
            "findings": [finding._asdict() for finding in findings],
        }
        show(value, text, as_json=self.json)
        return 0 if value["ok"] else 1
