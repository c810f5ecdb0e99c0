"""The user's data: records of several forms, in files of several kinds or from a hub."""

from eaft_ext.cli.records.record import Message, Part, Record
from eaft_ext.cli.records.source import is_plain_text, read_records

__all__ = ["Message", "Part", "Record", "is_plain_text", "read_records"]
