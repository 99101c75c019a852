"""Kernels prove themselves on the machine where they are to serve; docs/qualification.md says how.

classes.py   problems that are timed together
trials/      one file per op: small problems with known answers, and the calls that are timed
battery.py   judges one backend on the trials
worker.py    the child process in which a backend is judged
run.py       starts the children, with deadlines, and collects what they say
record.py    the file of results, and what "auto" learns from it
"""
