"""Faults injected into small runs, each many times: ``make faults`` writes docs/faults.md."""
