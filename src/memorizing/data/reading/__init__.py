"""Files of others, whatever they hold: archives, tables, folders, single files."""
