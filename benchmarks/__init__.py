"""The same work by us and by the alternatives, in one run on one machine: see README.md beside this file."""
