"""The protocol: tables, answers, records, recorded guests."""
