"""What people see: progress, tables, HTML, Markdown, SVG."""
