"""Does the guarded model behave better, and at what price?

`judges` turns one answer into a verdict; `table` turns verdicts into counts with intervals,
guarded beside unguarded and harmful beside harmless. A guarded number without its benign arm is
not a result.
"""
