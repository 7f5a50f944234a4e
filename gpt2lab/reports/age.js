// Shows how old an unfinished page is, and after its patience that the process has probably ended.
'use strict';
(() => {
const box = document.querySelector('.age'), {time, patience} = box.dataset;
const UNITS = [[86400, 'd'], [3600, 'h'], [60, 'min'], [1, 's']];
function show() {
  const seconds = Math.max(0, Math.round(Date.now() / 1000 - time));
  const [size, unit] = UNITS.find(([size]) => seconds >= size) ?? [1, 's'];
  const isStale = seconds > patience;
  box.classList.toggle('stale', isStale);
  box.querySelector('div').hidden = !isStale;
  box.querySelector('span').textContent = ` (${Math.floor(seconds / size)} ${unit} ago${isStale ? ', later than expected' : ''})`;
}
show();
setInterval(show, 5000);
})();
