"""The study. A package, since study.py in it would otherwise hide the folder of that name."""
