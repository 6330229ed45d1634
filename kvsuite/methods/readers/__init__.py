"""Readers, one file each; the file's name is the method's. There is none yet; a plug-in may bring one."""
