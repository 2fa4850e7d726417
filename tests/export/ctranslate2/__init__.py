"""Tests of the export to CTranslate2."""
