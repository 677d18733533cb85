"""Does the guarded model behave better, and at what price?

`judges` turns one answer into a verdict, `model_judge` and `refusal_score` are others who can, and
`agreement` puts two of them side by side. `table` turns verdicts into counts with the intervals of
`statistics`, guarded beside unguarded and harmful beside harmless; `utility` scores what harmless
questions are for. A guarded number without its benign arm is not a result.
"""
