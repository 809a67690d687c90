"""What pyproject.toml cannot say: every folder of the package, and conf/, which stays at the top for people."""

from setuptools import find_packages, setup

setup(packages=[*find_packages(include=["ulysses_exp", "ulysses_exp.*"]), "ulysses_exp.conf"])
