"""``python -m bigbatch`` is the ``bigbatch`` command, which launchers need as a module."""

from bigbatch.cli import entry

entry()
