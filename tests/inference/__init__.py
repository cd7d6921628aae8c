"""Tests of `myna.inference`; a package, because `cli` has test files of the same names."""
