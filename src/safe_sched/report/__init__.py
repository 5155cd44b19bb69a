"""The report of an audit: for the terminal, as one HTML file, and as JSON.

Everything here is made from `safe_sched.audit.findings.Findings`. Texts of the audited rows appear only where they are
asked for, and never as anything but text.
"""
