"""Tests of this room; a package, so that files of other rooms may share their names."""
