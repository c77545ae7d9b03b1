"""The book's chapter 6, reproduced: ``python -m pyconv book``.

runs      trains the experiments of `pyconv.network3.experiments` and keeps what they gave, one directory for each run
report    says what the runs gave; page and figures are how that is written and drawn
"""
