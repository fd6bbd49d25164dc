"""Python runs this when a process starts that a test has started, because ``conftest.py`` puts its folder on the path.

At the end of a process that has imported Lightning, the garbage collector goes through all objects again and again, for
seconds. It leaves out those that are frozen.
"""

import atexit
import gc

atexit.register(gc.freeze)
