"""Attacks on everything that reads what strangers wrote, and on runs that end early: `make torture`, `python -m torture --help`.

corpus.py       the sound inputs that all others are made from: corpus.zip, and how the formats' own writers made it
mutations.py    changes that know a format's structure: headers, pickles, zips, JSON, tables, folders
families.py     what is done with an input of each kind, and what counts as well ended
oracle.py       inputs in processes with limits of time and memory, and an eye on what they touch
kills.py        every signal at every moment of every kind of run; broken disks; two processes at one place
"""
