"`python -m fastkd` is the command `fastkd`"
import sys
from .cli import main

if __name__ == '__main__': sys.exit(main())
