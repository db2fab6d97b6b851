"""``python -m poise.cli`` is ``poise``; torchrun starts it so."""

import sys

from poise.cli.main import main

sys.exit(main())
