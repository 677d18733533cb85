"""Attacks that a guard was not fitted on.

`wrappers` puts requests into other words or other pictures; `pgd` searches an image within a bound;
`compliance` is what it searches for, through a defence if there is one (`surrogate`). Everything is
seeded, every image stays within its bound as 8-bit pixels, and is judged as a file would hold it.
"""
