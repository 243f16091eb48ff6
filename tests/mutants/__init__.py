"""`make mutants`: small changes of the code, one at a time, and whether a test notices.

A number in a paper rests on lines that look right. A test that runs a line need not notice when it is wrong; this says how often one does.

mutmut 3 was tried for it by reading: it leaves out what is decorated and what stands outside of functions, knows which tests call a function
but not which run a line, and draws no sample. cosmic-ray starts a Python, with torch, for every change and every test.
"""
