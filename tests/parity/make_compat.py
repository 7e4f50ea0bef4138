#!/usr/bin/env python3
"""Small directories as users have them, each with what Transformers makes of it. Run by hand; see README.md.

    python3 make_compat.py [--out DIR] [PREFIX...]

Without prefixes all cases are made anew, and directories of cases that are gone are removed.
"""
import argparse
import pathlib

import compat
import compat_formats  # noqa: F401  they add their cases
import compat_models  # noqa: F401
import compat_tokenizers  # noqa: F401

if __name__ == "__main__":
    here = pathlib.Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=here.parent / "testdata" / "compat")
    parser.add_argument("prefix", nargs="*", help="make only the cases whose names begin so")
    arguments = parser.parse_args()
    compat.make(arguments.out, arguments.prefix)
