"""The tasks, a module a subject.

Add a module here and it is found: every module of this package is loaded by the workers, and a task is named
after its place, such as `services.tasks.arithmetic.add`.
"""
