"""Charts for people: plotly figures and self-contained HTML files. The only home of plotly."""
