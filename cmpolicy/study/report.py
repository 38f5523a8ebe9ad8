"""x"""
from pathlib import Path
def write_report(folder, results, command):
    return folder
