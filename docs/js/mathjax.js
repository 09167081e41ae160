// Formulas: pymdownx.arithmatex writes \(...\) and \[...\], MathJax sets them in the reader's browser.
window.MathJax = {
  tex: { inlineMath: [["\\(", "\\)"]], displayMath: [["\\[", "\\]"]] },
  options: { ignoreHtmlClass: ".*", processHtmlClass: "arithmatex" },
};
// Pages that are loaded without a reload of the site.
if (window.document$) {
  document$.subscribe(() => window.MathJax.typesetPromise && window.MathJax.typesetPromise());
}
