"""``python -m bigbatch`` is the ``bigbatch`` command, which launchers need as a module."""

import sys

from bigbatch.cli import main

sys.exit(main())
